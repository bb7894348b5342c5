{#- Starts Synapse after synapse.orch.stop, and waits until every process is healthy. -#}

{%- from "synapse/orch/macros.jinja" import call with context %}

{{ call("Synapse is started and healthy", "synapse_process.start") }}
