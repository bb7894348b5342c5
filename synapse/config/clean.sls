{#- Undoes synapse.config. Media, secrets and keys, and with them the account that owns them, go only if the pillar says so. -#}

{%- from "synapse/map.jinja" import synapse with context %}

include:
  - synapse.process.clean

{%- set gone = [synapse.directories.config, synapse.directories.run, "/etc/tmpfiles.d/matrix-synapse.conf"] %}
{%- if synapse.clean.remove_data %}
  {%- do gone.append(synapse.directories.data) %}
{%- endif %}
{%- for path in gone %}

{{ path }} is gone:
  file.absent:
    - name: {{ path | json }}
    - require:
      - synapse_process: Synapse's processes are gone
{%- endfor %}

{%- if synapse.clean.remove_data %}

Synapse's user is gone:
  user.absent:
    - name: {{ synapse.user.name | json }}
    - require:
      - file: {{ synapse.directories.data }} is gone

Synapse's group is gone:
  group.absent:
    - name: {{ synapse.user.group | json }}
    - require:
      - user: Synapse's user is gone
{%- endif %}
