{#- Stops Synapse, proves it, and starts it again. -#}

include:
  - synapse.orch.stop
  - synapse.orch.start

extend:
  Synapse is started and healthy:
    salt.function:
      - require:
        - salt: Synapse is proven to be stopped
