{#- Makes a backup, while Synapse runs, and proves that it can be restored: see synapse_backup.create. -#}

{%- from "synapse/orch/macros.jinja" import call, fresh with context %}

{{ fresh() }}
{{ call("A backup is made and verified", "synapse_backup.create") }}
