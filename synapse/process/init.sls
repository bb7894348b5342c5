{#- One unit and one container for each process of the plan. -#}

{%- from "synapse/map.jinja" import synapse with context %}

include:
  - synapse.docker
  - synapse.image
  - synapse.postgres
  - synapse.redis
  - synapse.config

Python is installed on the host:
  pkg.installed:
    - name: python3-minimal

The units' helper is in place:
  file.managed:
    - name: /usr/local/lib/matrix-synapse/wait-until-ready
    - source: salt://synapse/process/files/wait-until-ready.py
    - mode: "0755"
    - makedirs: true

Synapse's processes are running:
  synapse_process.running:
    - require:
      - pkg: Python is installed on the host
      - file: The units' helper is in place
      - cmd: Synapse's Docker network exists
      - synapse_config: Synapse's configuration is in place
      - cmd: The directories of Synapse's sockets exist
