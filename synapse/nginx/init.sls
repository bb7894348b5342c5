{#- nginx in front of Synapse: sends every request to a process that can answer it. -#}

{%- from "synapse/map.jinja" import synapse with context %}

{%- if synapse.nginx.managed %}
{%- set context = salt["synapse_nginx.context"]() %}
{%- set file = "/etc/nginx/conf.d/matrix-synapse.conf" %}
{%- set helpers = "/usr/local/lib/matrix-synapse" %}
{%- set gates = synapse.directories.run ~ "/gate" %}
{%- set loaded = ([context.nginx.status_socket, context.digest, gates, context.nginx.user] + context.gates) | join(" ") %}

include:
  - synapse.config
  - synapse.process

nginx is installed:
  pkg.installed:
    {#- The gate needs more of Python than the units' helpers. #}
    - pkgs: [{{ synapse.nginx.package | json }}, python3]
    - require_in:
      - synapse_command: The directories of Synapse's sockets exist

{#- nginx listens for bridges on the gateway of their Docker network. #}
nginx starts after Docker:
  file.managed:
    - name: /etc/systemd/system/nginx.service.d/matrix-synapse.conf
    - source: salt://synapse/nginx/files/nginx.service.jinja
    - template: jinja
    - context: {{ context | json }}
    - mode: "0644"
    - makedirs: true

{%- for unit in ("socket", "service") %}

The gate's {{ unit }} is declared:
  file.managed:
    - name: /etc/systemd/system/synapse-gate@.{{ unit }}
    - source: salt://synapse/nginx/files/gate.{{ unit }}.jinja
    - template: jinja
    - context: {{ {"helpers": helpers, "run": synapse.directories.run, "nginx": context.nginx} | json }}
    - mode: "0644"
    {#- Between this and the command below, the unit and the program that it starts may not fit. #}
    - require:
      - file: nginx is configured for Synapse
    - require_in:
      - synapse_command: nginx runs with this configuration
{%- endfor %}

nginx is configured for Synapse:
  file.managed:
    - name: {{ file }}
    - source: salt://synapse/nginx/files/matrix-synapse.conf.jinja
    - template: jinja
    - context: {{ context | json }}
    - mode: "0644"
    - makedirs: true
    {#- nginx itself accepts the whole of its configuration, with the candidate in it, before that replaces a good one. #}
    - tmp_ext: .conf
    - check_cmd: {{ helpers }}/check-nginx {{ file }}
    - require:
      - pkg: nginx is installed
      - synapse_command: Synapse's Docker network exists
      - synapse_command: The directories of Synapse's sockets exist
      - synapse_process: Synapse's processes are running

{#- The running nginx is asked which configuration it has: so a run that was cut off is put right by the next. #}
nginx runs with this configuration:
  synapse_command.run:
    - name: {{ helpers }}/load-nginx {{ loaded }}
    - done_if: {{ helpers }}/nginx-is-loaded {{ loaded }}
    - require:
      - file: nginx is configured for Synapse
      - file: nginx starts after Docker

{%- if not context.nginx.media_cache %}

nginx keeps no media:
  file.absent:
    - name: {{ context.nginx.media_cache_directory }}
    - require:
      - synapse_command: nginx runs with this configuration
{%- endif %}

nginx starts at boot:
  service.enabled:
    - name: nginx
    - require:
      - pkg: nginx is installed

{%- for helper in ("check-nginx.sh", "load-nginx.sh", "nginx-is-loaded.sh", "gate.py") %}

The helper {{ helper }} is in place:
  file.managed:
    - name: {{ helpers }}/{{ helper.partition(".")[0] }}
    - source: salt://synapse/nginx/files/{{ helper }}
    - mode: "0755"
    - makedirs: true
    {%- if helper == "check-nginx.sh" %}
    - require_in:
      - file: nginx is configured for Synapse
    {%- else %}
    - require:
      - file: nginx is configured for Synapse
    - require_in:
      - synapse_command: nginx runs with this configuration
    {%- endif %}
{%- endfor %}
{%- endif %}

Nothing is left of removed workers:
  synapse_process.pruned:
    - require:
      - synapse_process: Synapse's processes are running
      {%- if synapse.nginx.managed %}
      - synapse_command: nginx runs with this configuration
      {%- endif %}
