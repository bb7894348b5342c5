{#- Undoes synapse.docker, except the engine. -#}

{%- from "synapse/map.jinja" import synapse with context %}

Synapse's Docker network is gone:
  cmd.run:
    - name: docker network rm {{ synapse.docker.network.name }}
    {#- A bridge's container may still be on it. #}
    - onlyif: test "$(docker network inspect --format '{{ "{{len .Containers}}" }}' {{ synapse.docker.network.name }})" = 0
