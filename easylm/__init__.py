"""EasyLM: instruction-tune, align, export and score LLaMA models on TPU pods."""

import pathlib

# setup.py installs models/, trainers/, ... as easylm.models, easylm.trainers, ...
# In a source checkout those folders sit beside this one, so look for them there too.
_checkout = pathlib.Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "trainers").is_dir():
    __path__.append(str(_checkout))
