"""Pretrained transformers as plain parameter trees and pure functions, exchanged with everybody else exactly."""

from fmodels import assets as assets
from fmodels import models as models
from fmodels import tree as tree
from fmodels.api import abstract as abstract
from fmodels.api import check as check
from fmodels.api import forward as forward
from fmodels.api import init as init
from fmodels.api import match_config as match_config
from fmodels.api import partition_specs as partition_specs
from fmodels.checkpoint import load as load
from fmodels.checkpoint import load_config as load_config
from fmodels.checkpoint import save as save
from fmodels.generate import Generated as Generated
from fmodels.generate import generate as generate
from fmodels.generate import stream as stream
from fmodels.generation.config import GenerationConfig as GenerationConfig
from fmodels.layout import from_disk as from_disk
from fmodels.layout import to_disk as to_disk
from fmodels.nn.cache import init_cache as init_cache
from fmodels.types import Array as Array
from fmodels.types import Cache as Cache
from fmodels.types import Output as Output
from fmodels.types import Params as Params

__version__ = "0.1.0"
