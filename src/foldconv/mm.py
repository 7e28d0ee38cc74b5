"""What OpenMMLab's configs name, under the name that users import."""

from .integrations.mm import SUFFIX as SUFFIX
from .integrations.mm import FoldConvOptimWrapperConstructor as FoldConvOptimWrapperConstructor
from .integrations.mm import FoldHook as FoldHook
from .integrations.mm import expanded as expanded
from .integrations.mm import fold_checkpoint as fold_checkpoint
