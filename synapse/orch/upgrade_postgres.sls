{#- Moves Synapse's data to the PostgreSQL major version that the minion's pillar asks for: see synapse_postgres.upgrade, where
    all is done that has to be done together, and undone if any of it fails. Another method than the default, say:

        salt-run state.orchestrate synapse.orch.upgrade_postgres pillar='{"arguments": {"method": "dump"}}' -#}

{%- from "synapse/orch/macros.jinja" import call_and_follow, fresh with context %}

{{ fresh() }}
{{ call_and_follow("Synapse's data are on the PostgreSQL of the pillar", "synapse_postgres.upgrade", "synapse/postgres/upgrade") }}
