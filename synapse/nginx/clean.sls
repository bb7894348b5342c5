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
