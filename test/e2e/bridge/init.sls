{#- A bridge as a formula of its own would install it, on the host, beside the homeserver: it knows of the homeserver
    what the map says, and registers itself by the hook, in the same run that brings the registration to Synapse. -#}

{%- from "synapse/appservice/map.jinja" import homeserver with context %}
{%- set id = "testbridge" %}
{%- set port = 29318 %}
{%- set files = "salt://test/e2e/bridge/" %}
{%- set mautrix = salt["cp.get_file_str"]("salt://test/requirements.txt") | regex_search("(mautrix==.*)") | first %}

include:
  - synapse

The test bridge is registered:
  synapse_appservice.registered:
    - name: {{ id }}
    - registration:
        url: http://{{ homeserver.host_address }}:{{ port }}
        sender_localpart: {{ id }}bot
        rate_limited: false
        namespaces:
          users:
            - exclusive: true
              regex: {{ ("@" ~ id ~ "_.*:" ~ (homeserver.server_name | regex_escape)) | json }}
    - arguments:
        - --label=org.example.testbridge=here
    - require_in:
      - synapse_appservice: Appservices have their tokens

The test bridge is installed:
  cmd.run:
    - name: python3 -m venv /opt/test-bridge && /opt/test-bridge/bin/pip install --quiet {{ mautrix }}
    - unless: /opt/test-bridge/bin/python -c 'import mautrix'

The test bridge's program is in place:
  file.managed:
    - name: /opt/test-bridge/bridge.py
    - source: {{ files }}bridge.py
    - mode: "0755"
    - require:
      - cmd: The test bridge is installed

{#- Rendered when its turn has come: the tokens are made by then. #}
The test bridge is configured:
  file.managed:
    - name: /etc/test-bridge/config.json
    - source: {{ files }}config.json.jinja
    - template: jinja
    - context: {{ {"id": id, "homeserver": homeserver, "port": port} | json }}
    - mode: "0600"
    - makedirs: true
    - show_changes: false
    - require:
      - synapse_appservice: The test bridge is registered

The test bridge's unit is in place:
  file.managed:
    - name: /etc/systemd/system/test-bridge.service
    - source: {{ files }}test-bridge.service.jinja
    - template: jinja
    - context: {{ {"homeserver": homeserver} | json }}
    - mode: "0644"

The test bridge is running:
  service.running:
    - name: test-bridge
    - enable: true
    - require:
      - sls: synapse
    - watch:
      - file: The test bridge's program is in place
      - file: The test bridge is configured
      - file: The test bridge's unit is in place
