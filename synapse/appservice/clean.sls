{#- Removes the registrations from the configuration. What other formulas registered, and the tokens that were made,
    are data: they go with `synapse:clean:remove_data` only. -#}
{%- set settings = salt["synapse_pillar.settings"]() %}
Synapse's registrations of appservices are gone:
  file.absent:
    - name: {{ (settings.directories.config ~ "/appservices") | json }}
{%- if settings.clean.remove_data %}

Appservices' tokens and what other formulas registered are gone:
  file.absent:
    - name: {{ (settings.directories.data ~ "/appservices") | json }}
{%- endif %}
