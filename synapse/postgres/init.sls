{#- PostgreSQL from the distribution's packages, with Synapse's role and database.

    The SQL steps are commands, not postgres_user and postgres_database: those states don't load before psql is
    installed, and so can't say under test=True what a first run would do. -#}

{%- from "synapse/map.jinja" import synapse with context %}
{%- set postgres = synapse.postgres %}

{%- if postgres.managed %}
{%- set version = salt["synapse_postgres.version"]() %}
{%- set options = salt["synapse_postgres.options"]() %}
{%- set digest = options | json | sha256 %}
{%- set cluster = "/etc/postgresql/" ~ version ~ "/main" %}
{%- set user = synapse.user.name %}
{%- set service = "postgresql@" ~ version ~ "-main" %}
{%- set psql = "runuser --user postgres -- psql --cluster " ~ version ~ "/main --no-psqlrc --tuples-only --no-align --command " %}

include:
  - synapse.config

PostgreSQL is installed:
  pkg.installed:
    - name: postgresql-{{ version }}

The helper check-postgresql is in place:
  file.managed:
    - name: /usr/local/lib/matrix-synapse/check-postgresql
    - source: salt://synapse/postgres/files/check-postgresql.sh
    - mode: "0755"
    - makedirs: true

PostgreSQL is configured for Synapse:
  file.managed:
    - name: {{ cluster }}/conf.d/matrix-synapse.conf
    - source: salt://synapse/postgres/files/postgresql.conf.jinja
    - template: jinja
    - context: {{ {"options": options, "digest": digest} | json }}
    - user: postgres
    - group: postgres
    - mode: "0644"
    - makedirs: true
    {#- PostgreSQL would not start with a setting that it does not know. #}
    - check_cmd: /usr/local/lib/matrix-synapse/check-postgresql {{ version }}
    - require:
      - pkg: PostgreSQL is installed
      - file: The helper check-postgresql is in place

{#- The running server is asked which configuration it has: so a run that was cut off is put right by the next. What it can
    read, but not take over (pg_file_settings), wants a restart; with what it can't read, it would not come back. #}
PostgreSQL runs with this configuration:
  synapse_command.run:
    - name: runuser --user postgres -- /usr/lib/postgresql/{{ version }}/bin/postgres -D {{ cluster }} -C max_connections >/dev/null && systemctl $({{ psql }} "select case when exists (select from pg_file_settings where error is not null) then 'restart' else 'reload-or-restart' end" || echo restart) {{ service }}
    - done_if: {{ psql }} "select current_setting('synapse_formula.digest', true) || (exists (select from pg_settings where pending_restart and name in ('{{ options | join("','") }}')))" | grep --quiet --line-regexp {{ digest }}false
    - require:
      - file: PostgreSQL is configured for Synapse

PostgreSQL starts at boot:
  service.enabled:
    - name: {{ service }}
    - require:
      - pkg: PostgreSQL is installed

Synapse's database role exists:
  synapse_command.run:
    - name: runuser --user postgres -- createuser --cluster {{ version }}/main {{ user }}
    - done_if: {{ psql }} "select rolname from pg_roles" | grep --quiet --line-regexp {{ user }}
    - require:
      - synapse_command: PostgreSQL runs with this configuration
      - user: Synapse's user exists

Synapse's database exists:
  synapse_command.run:
    - name: runuser --user postgres -- createdb --cluster {{ version }}/main --owner {{ user }} --encoding UTF8 --locale C --template template0 {{ postgres.database }}
    - done_if: {{ psql }} "select datname from pg_database" | grep --quiet --line-regexp {{ postgres.database }}
    - require:
      - synapse_command: Synapse's database role exists
    - require_in:
      - synapse_process: Synapse's processes are running

{#- From here on it is this cluster, whatever the pillar says: another would be empty. #}
The cluster of Synapse's data is recorded:
  synapse_postgres.recorded:
    - name: {{ version }}/main
    - require:
      - synapse_command: Synapse's database exists
    - require_in:
      - synapse_process: Synapse's processes are running
{%- endif %}
