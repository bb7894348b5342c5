{#- Undoes synapse.docker, except the engine. -#}

{%- from "synapse/map.jinja" import synapse with context %}

include:
  - synapse.process.clean

Synapse's Docker network is gone:
  cmd.run:
    - name: docker network rm {{ synapse.docker.network.name }}
    {#- A bridge's container may still be on it. Synapse's own are gone by then. #}
    - onlyif: docker network inspect {{ synapse.docker.network.name }}
    - unless: docker network inspect --format '{{ "{{range .Containers}}{{println .Name}}{{end}}" }}' {{ synapse.docker.network.name }} | grep --quiet --invert-match -e '^matrix-synapse' -e '^$'
    - require:
      - synapse_process: Synapse's processes are gone
