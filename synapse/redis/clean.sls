{#- Undoes synapse.redis, except the package. -#}

include:
  - synapse.process.clean

Synapse's Redis is stopped:
  service.dead:
    - name: redis-server@synapse
    - enable: false
    - require:
      - synapse_process: Synapse's processes are gone

{%- for path in ("/etc/redis/redis-synapse.conf", "/etc/systemd/system/redis-server@synapse.service.d", "/run/redis-synapse") %}

{{ path }} is gone:
  file.absent:
    - name: {{ path }}
    - require:
      - service: Synapse's Redis is stopped
{%- endfor %}
