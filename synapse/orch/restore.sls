{#- Goes back to a backup, or leaves everything as it was: see synapse_backup.restore.

        salt-run state.orchestrate synapse.orch.restore pillar='{"arguments": {"backup": "20261124T220046Z"}}' -#}

{%- from "synapse/orch/macros.jinja" import call, fresh with context %}

{{ fresh() }}
{{ call("The backup is restored and Synapse healthy", "synapse_backup.restore") }}
