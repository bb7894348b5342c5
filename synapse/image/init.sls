{#- The image that every Synapse process runs in: pulled, or built here, and extended if that is asked for. -#}

{%- from "synapse/map.jinja" import synapse with context %}

{%- if not salt["synapse_image.sdk_installed"]() %}
Salt's Python has the Docker SDK:
  pip.installed:
    - name: docker >=7,<8
    - reload_modules: true
    - require_in:
      - synapse_image: Synapse's image is present
{%- endif %}

{%- if synapse.image.source == "build" and synapse.image.build.base == "debootstrap" %}
debootstrap is installed:
  pkg.installed:
    - name: debootstrap
    - require_in:
      - synapse_image: Synapse's image is present
{%- endif %}

Synapse's image is present:
  synapse_image.present:
    - name: {{ salt["synapse_image.references"](synapse.image).wanted | json }}
    - image: {{ synapse.image | json }}
