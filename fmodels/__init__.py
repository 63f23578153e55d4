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
from fmodels.checkpoint import push_to_hub as push_to_hub
from fmodels.checkpoint import save as save
from fmodels.embed import embed as embed
from fmodels.embed import embed_texts as embed_texts
from fmodels.generate import Generated as Generated
from fmodels.generate import generate as generate
from fmodels.generate import stream as stream
from fmodels.generation.config import GenerationConfig as GenerationConfig
from fmodels.layout import disk_names as disk_names
from fmodels.layout import from_disk as from_disk
from fmodels.layout import to_disk as to_disk
from fmodels.nn.cache import init_cache as init_cache
from fmodels.programs import compile_count as compile_count
from fmodels.transforms.casting import cast as cast
from fmodels.transforms.counting import floating_point_ops as floating_point_ops
from fmodels.transforms.counting import memory_footprint as memory_footprint
from fmodels.transforms.counting import num_parameters as num_parameters
from fmodels.transforms.embeddings import resize_embeddings as resize_embeddings
from fmodels.transforms.heads import mask_heads as mask_heads
from fmodels.transforms.heads import prune_heads as prune_heads
from fmodels.transforms.heads import scale_heads as scale_heads
from fmodels.transforms.importance import head_importance as head_importance
from fmodels.transforms.importance import least_important_heads as least_important_heads
from fmodels.transforms.stacking import stack_layers as stack_layers
from fmodels.transforms.stacking import unstack_layers as unstack_layers
from fmodels.transforms.state import map_state as map_state
from fmodels.transforms.tying import tie as tie
from fmodels.transforms.tying import untie as untie
from fmodels.types import Array as Array
from fmodels.types import Cache as Cache
from fmodels.types import Output as Output
from fmodels.types import Params as Params
from fmodels.verify import verify as verify

__version__ = "0.1.0"
