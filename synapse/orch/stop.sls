{#- Stops Synapse and proves it: see synapse_process.stop. `salt-run state.orchestrate synapse.orch.start` undoes it. -#}

{%- from "synapse/orch/macros.jinja" import call, fresh with context %}

{{ fresh() }}
{{ call("Synapse is proven to be stopped", "synapse_process.stop") }}
