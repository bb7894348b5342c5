{#- One unit and one container for each process of the plan. -#}

{%- from "synapse/map.jinja" import synapse with context %}

include:
  - synapse.docker
  - synapse.image
  - synapse.postgres
  - synapse.redis
  - synapse.config

What the units' helpers run on is installed:
  pkg.installed:
    - pkgs: [python3-minimal, curl]

{%- for helper in ("create-container.sh", "wait-until-ready.py") %}

The units' helper {{ helper }} is in place:
  file.managed:
    - name: /usr/local/lib/matrix-synapse/{{ helper.partition(".")[0] }}
    - source: salt://synapse/process/files/{{ helper }}
    - mode: "0755"
    - makedirs: true
    - require_in:
      - synapse_process: Synapse's processes are running
{%- endfor %}

Synapse's processes are running:
  synapse_process.running:
    - require:
      - pkg: What the units' helpers run on is installed
      - synapse_command: Synapse's Docker network exists
      - synapse_config: Synapse's configuration is in place
      - synapse_command: The directories of Synapse's sockets exist
