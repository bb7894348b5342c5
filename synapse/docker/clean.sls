{#- Undoes synapse.docker, except the engine. -#}

{%- from "synapse/map.jinja" import synapse with context %}

Synapse's Docker network is gone:
  cmd.run:
    - name: docker network rm {{ synapse.docker.network.name }}
    - onlyif: docker network inspect {{ synapse.docker.network.name }}
