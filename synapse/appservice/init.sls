{#- Makes the tokens that the appservices' registrations lack. Their files are written with the rest of the
    configuration, see synapse/config. -#}
Appservices have their tokens:
  synapse_appservice.tokens_exist
