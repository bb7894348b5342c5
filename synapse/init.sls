{#- A Matrix homeserver: Synapse's main process and its workers, PostgreSQL, Redis and nginx, as the pillar says. -#}

{%- if "synapse_workers.validate" not in salt %}
The formula's modules are on the minion:
  test.fail_without_changes:
    - comment: "Run `salt-call saltutil.sync_all` first: Salt does not sync a formula's modules by itself before state.apply."
{%- else %}
{%- set faults = salt["synapse_workers.outdated_modules"]() or salt["synapse_workers.validate"]() %}
{%- if faults %}
The pillar is right:
  synapse_pillar.right:
    - faults: {{ faults | json }}
{%- elif salt["synapse_maintenance.fault"]() %}
Synapse is not under maintenance:
  test.fail_without_changes:
    - comment: {{ salt["synapse_maintenance.fault"]() | json }}
{%- elif salt["synapse_rolling.fault"]() %}
No rolling restart is at work:
  test.fail_without_changes:
    - comment: {{ salt["synapse_rolling.fault"]() | json }}
{%- elif salt["synapse_postgres.fault"]() %}
PostgreSQL is the one that the pillar asks for:
  test.fail_without_changes:
    - comment: {{ salt["synapse_postgres.fault"]() | json }}
{%- elif salt["synapse_backup.fault"]() %}
No restore is unfinished:
  test.fail_without_changes:
    - comment: {{ salt["synapse_backup.fault"]() | json }}
{%- else %}
include:
  - synapse.docker
  - synapse.image
  - synapse.postgres
  - synapse.redis
  - synapse.appservice
  - synapse.config
  - synapse.process
  - synapse.nginx
{#- It does not keep the run from anything: that may be what mends a process for which nginx was not opened. #}
{%- if salt["synapse_maintenance.closed_fault"]() %}

nginx lets users in:
  test.fail_without_changes:
    - comment: {{ salt["synapse_maintenance.closed_fault"]() | json }}
    - order: last
{%- endif %}
{%- endif %}
{%- endif %}
