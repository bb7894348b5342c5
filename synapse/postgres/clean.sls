{#- Undoes synapse.postgres, except the package. The database and the role go only if the pillar says so. -#}

{%- from "synapse/map.jinja" import synapse with context %}

{%- if synapse.postgres.managed %}
{%- set version = salt["synapse_postgres.version"]() %}

include:
  - synapse.process.clean

{%- if synapse.clean.remove_data %}
{#- As synapse_backup.restore names them. #}
{%- set names = synapse.postgres.database[:39] ~ "_(before|new)_[0-9]{8}T[0-9]{6}Z" %}
{%- set aside = "runuser --user postgres -- psql --cluster " ~ version ~ "/main --no-psqlrc --tuples-only --no-align --command 'select datname from pg_database' | grep --extended-regexp --line-regexp '" ~ names ~ "'" %}

Synapse's database is gone:
  cmd.run:
    - name: runuser --user postgres -- dropdb --cluster {{ version }}/main --if-exists {{ synapse.postgres.database }}
    - onlyif: runuser --user postgres -- psql --cluster {{ version }}/main --no-psqlrc --tuples-only --no-align --command "select datname from pg_database" | grep --quiet --line-regexp {{ synapse.postgres.database }}
    - require:
      - synapse_process: Synapse's processes are gone

The databases that restores put aside are gone:
  cmd.run:
    - name: {{ aside }} | xargs --max-args 1 runuser --user postgres -- dropdb --cluster {{ version }}/main
    - onlyif: {{ aside }} | grep --quiet .
    - require:
      - synapse_process: Synapse's processes are gone

Synapse's database role is gone:
  cmd.run:
    - name: runuser --user postgres -- dropuser --cluster {{ version }}/main --if-exists {{ synapse.user.name }}
    - onlyif: runuser --user postgres -- psql --cluster {{ version }}/main --no-psqlrc --tuples-only --no-align --command "select rolname from pg_roles" | grep --quiet --line-regexp {{ synapse.user.name }}
    - require:
      - cmd: Synapse's database is gone
      - cmd: The databases that restores put aside are gone
{%- endif %}

Synapse's settings of PostgreSQL are gone:
  file.absent:
    - name: /etc/postgresql/{{ version }}/main/conf.d/matrix-synapse.conf
    - require:
      - synapse_process: Synapse's processes are gone

PostgreSQL runs without Synapse's settings:
  cmd.run:
    - name: systemctl restart postgresql@{{ version }}-main
    - onchanges:
      - file: Synapse's settings of PostgreSQL are gone
{%- endif %}
