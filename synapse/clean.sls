{#- Undoes everything that the formula did, except data: media, secrets, keys, the database. Those go only if the pillar
    says `synapse:clean:remove_data: true`. Packages stay, since others may use them, and so do logs. -#}

include:
  - synapse.nginx.clean
  - synapse.process.clean
  - synapse.appservice.clean
  - synapse.redis.clean
  - synapse.postgres.clean
  - synapse.image.clean
  - synapse.config.clean
  - synapse.docker.clean
