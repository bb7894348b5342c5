{#- Undoes synapse.nginx, except the package. -#}

{%- for path in ("/etc/nginx/conf.d/matrix-synapse.conf", "/etc/systemd/system/nginx.service.d/matrix-synapse.conf", salt["synapse_maintenance.switch_file"]()) %}

{{ path }} is gone:
  file.absent:
    - name: {{ path }}
    - onchanges_in:
      - cmd: nginx runs without Synapse
{%- endfor %}

nginx keeps no media:
  file.absent:
    - name: {{ salt["synapse_nginx.media_cache_directory"]() }}
    - require:
      - cmd: nginx runs without Synapse

nginx runs without Synapse:
  cmd.run:
    - name: systemctl daemon-reload && systemctl reload-or-restart nginx
    - onlyif: systemctl is-active --quiet nginx

The gate is closed:
  cmd.run:
    - name: systemctl stop 'synapse-gate@*.socket' 'synapse-gate@*.service'
    - onlyif: systemctl is-active --quiet 'synapse-gate@*.socket'
    - require:
      - cmd: nginx runs without Synapse
{%- for unit in ("socket", "service") %}

The gate's {{ unit }} is gone:
  file.absent:
    - name: /etc/systemd/system/synapse-gate@.{{ unit }}
    - require:
      - cmd: The gate is closed
{%- endfor %}
