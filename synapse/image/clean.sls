{#- Removes the images that were built here, the pulled one and their byte code, except what a container still uses. -#}

{%- from "synapse/map.jinja" import synapse with context %}

include:
  - synapse.process.clean

Synapse's images are absent:
  synapse_image.absent:
    - image: {{ synapse.image | json }}
    - require:
      - synapse_process: Synapse's processes are gone
