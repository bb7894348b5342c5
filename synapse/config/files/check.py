"""
Runs inside a container of the image: has Synapse parse the configuration of each process, and exits with 1 if it refuses
any. Standard input is a JSON map from process name to its configuration files.
"""

import json
import sys

from synapse.config._base import ConfigError
from synapse.config.appservice import load_appservices
from synapse.config.homeserver import HomeServerConfig


def refusal(paths):
    """What Synapse says against these files, None if it accepts them."""
    try:
        config = HomeServerConfig.load_config("", [word for path in paths for word in ("-c", path)])
        # Synapse reads these only when it starts.
        load_appservices(config.server.server_name, config.appservice.app_service_config_files)
    except ConfigError as err:
        return f"{'.'.join(map(str, err.path or []))}: {err.msg}".lstrip(": ")
    except (Exception, SystemExit) as err:
        return f"{type(err).__name__}: {err}"
    return None


refused = {name: said for name, paths in json.load(sys.stdin).items() if (said := refusal(paths))}
for name, said in refused.items():
    print(f"{name}: {said}")
sys.exit(bool(refused))
