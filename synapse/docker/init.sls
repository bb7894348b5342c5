{#- The Docker engine, and the network that Synapse's containers share with bridges. -#}

{%- from "synapse/map.jinja" import synapse with context %}
{%- set network = synapse.docker.network %}

{%- if synapse.docker.managed %}
The Docker engine is installed:
  pkg.installed:
    - name: {{ synapse.docker.package | json }}

The Docker engine is running:
  service.running:
    - name: docker
    - enable: true
    - require:
      - pkg: The Docker engine is installed
    - require_in:
      - synapse_command: Synapse's Docker network exists
{%- endif %}

Synapse's Docker network exists:
  synapse_command.run:
    - name: docker network create --subnet {{ network.subnet }} {{ network.name }}
    - done_if: docker network inspect --format '{{ "{{range .IPAM.Config}}{{println .Subnet}}{{end}}" }}' {{ network.name }} | grep --quiet --line-regexp --fixed-strings {{ network.subnet }}
