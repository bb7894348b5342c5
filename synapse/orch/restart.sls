{#- Stops Synapse, proves it, and starts it again. The arguments are those of synapse_process.stop. -#}

{%- from "synapse/orch/macros.jinja" import call, fresh with context %}
{%- set holder = dict(pillar.get("arguments", {}).items() | selectattr(0, "equalto", "holder")) %}

{{ fresh() }}
{{ call("Synapse is proven to be stopped", "synapse_process.stop") }}
{{ call("Synapse is started and healthy", "synapse_process.start", holder) }}
    - require:
      - salt: Synapse is proven to be stopped
