{#- Undoes synapse.process. -#}

Synapse's processes are gone:
  synapse_process.pruned:
    - keep: []

The units' helpers are gone:
  file.absent:
    - name: /usr/local/lib/matrix-synapse
    - require:
      - synapse_process: Synapse's processes are gone
