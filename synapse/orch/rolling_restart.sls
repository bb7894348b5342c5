{#- Restarts Synapse's processes one after the other, while users are served: see synapse_rolling.restart. Some of them:

        salt-run state.orchestrate synapse.orch.rolling_restart pillar='{"arguments": {"names": ["matrix-synapse"]}}' -#}

{%- from "synapse/orch/macros.jinja" import call_and_follow, fresh with context %}

{{ fresh() }}
{{ call_and_follow("Every process restarted and is healthy", "synapse_rolling.restart", "synapse/rolling") }}
