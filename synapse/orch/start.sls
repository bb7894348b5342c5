{#- Starts Synapse after synapse.orch.stop, and waits until every process is healthy. -#}

{%- from "synapse/orch/macros.jinja" import call, fresh with context %}

{{ fresh() }}
{{ call("Synapse is started and healthy", "synapse_process.start") }}
