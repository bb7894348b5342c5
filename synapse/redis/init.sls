{#- A Redis of Synapse's own, on a Unix socket: an instance of the distribution's unit, beside the system's Redis. -#}

{%- from "synapse/map.jinja" import synapse with context %}

{%- if synapse.redis.managed %}
{%- set socket = "/run/redis-synapse/redis.sock" %}
{%- set sources = ["salt://synapse/redis/files/redis.conf.jinja", "salt://synapse/redis/files/unit.conf.jinja"] %}
{%- set digest = [synapse.user.group, salt["cp.hash_file"](sources[0]).hsum, salt["cp.hash_file"](sources[1]).hsum] | json | sha256 %}

include:
  - synapse.config

Redis is installed:
  pkg.installed:
    - name: redis-server

Redis is configured for Synapse:
  file.managed:
    - name: /etc/redis/redis-synapse.conf
    - source: {{ sources[0] }}
    - template: jinja
    - context: {{ {"digest": digest, "socket": socket} | json }}
    - mode: "0644"
    - makedirs: true
    - require:
      - pkg: Redis is installed

Redis lets Synapse enter its socket:
  file.managed:
    - name: /etc/systemd/system/redis-server@synapse.service.d/matrix-synapse.conf
    - source: {{ sources[1] }}
    - template: jinja
    - context: {{ {"group": synapse.user.group} | json }}
    - mode: "0644"
    - makedirs: true
    - require:
      - group: Synapse's group exists

{#- The running server is asked which configuration it has: so a run that was cut off is put right by the next. #}
Redis runs with this configuration:
  synapse_command.run:
    - name: systemctl daemon-reload && systemctl restart redis-server@synapse
    - done_if: redis-cli -s {{ socket }} config get proc-title-template | grep --quiet --fixed-strings {{ digest }}
    - require:
      - file: Redis is configured for Synapse
      - file: Redis lets Synapse enter its socket
    - require_in:
      - synapse_process: Synapse's processes are running

Redis starts at boot:
  service.enabled:
    - name: redis-server@synapse
    - require:
      - pkg: Redis is installed
{%- endif %}
