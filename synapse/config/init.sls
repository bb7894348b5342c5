{#- The account, the directories, the secrets, and every file that Synapse reads. -#}

{%- from "synapse/map.jinja" import synapse with context %}
{%- set user = synapse.user %}
{%- set dirs = synapse.directories %}

include:
  - synapse.image
  - synapse.appservice

Synapse's group exists:
  group.present:
    - name: {{ user.group | json }}
    - gid: {{ user.gid | json }}
    - system: true

Synapse's user exists:
  user.present:
    - name: {{ user.name | json }}
    - uid: {{ user.uid | json }}
    - gid: {{ user.group | json }}
    - home: {{ dirs.data | json }}
    - createhome: false
    - shell: /usr/sbin/nologin
    - system: true
    - require:
      - group: Synapse's group exists

{%- set directories = [
  [dirs.config, "root", user.group, "0750"],
  [dirs.config ~ "/workers", "root", user.group, "0750"],
  [dirs.config ~ "/appservices", "root", user.group, "0750"],
  [dirs.data, "root", user.group, "0750"],
  [dirs.data ~ "/secrets", "root", user.group, "0750"],
  [dirs.data ~ "/media", user.name, user.group, "0750"],
] %}
{%- for path, owner, group, mode in directories %}

{{ path }} exists:
  file.directory:
    - name: {{ path | json }}
    - user: {{ owner | json }}
    - group: {{ group | json }}
    - mode: {{ mode | json }}
    - makedirs: true
    - require:
      - user: Synapse's user exists
    - require_in:
      - synapse_config: Synapse's secrets exist
{%- endfor %}

The directories of Synapse's sockets are declared:
  file.managed:
    - name: /etc/tmpfiles.d/matrix-synapse.conf
    - source: salt://synapse/config/files/tmpfiles.conf.jinja
    - template: jinja
    - mode: "0644"
    - context: {{ {"run": dirs.run, "user": user, "nginx_user": synapse.nginx.user} | json }}
    - require:
      - user: Synapse's user exists

The directories of Synapse's sockets exist:
  synapse_command.run:
    - name: systemd-tmpfiles --create /etc/tmpfiles.d/matrix-synapse.conf
    - done_if: >-
        cd {{ dirs.run }} && test "$(stat --format '%a %U %G' public private gate nginx root units)" =
        "$(printf '%s\n' '750 {{ user.name }} {{ synapse.nginx.user }}' '700 {{ user.name }} {{ user.group }}' '750 root {{ synapse.nginx.user }}' '755 root root' '700 root root' '711 root root')"
    - require:
      - file: The directories of Synapse's sockets are declared

Synapse's secrets exist:
  synapse_config.secrets_exist:
    - name: {{ (dirs.data ~ "/secrets") | json }}

Synapse's configuration is in place:
  synapse_config.managed:
    - name: {{ dirs.config | json }}
    - image: {{ salt["synapse_image.references"](synapse.image).wanted | json }}
    - require:
      - synapse_image: Synapse's image is present
      - synapse_config: Synapse's secrets exist
      - synapse_appservice: Appservices have their tokens
