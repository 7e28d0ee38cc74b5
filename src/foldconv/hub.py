"""Hugging Face's models and hub, under the name that users import."""

from .integrations.hub import KEY as KEY
from .integrations.hub import describe as describe
from .integrations.hub import expand as expand
from .integrations.hub import fold as fold
from .integrations.hub import from_pretrained as from_pretrained
from .integrations.hub import push_to_hub as push_to_hub
from .integrations.hub import save_fold as save_fold
from .integrations.hub import save_pretrained as save_pretrained
