"""Models, prompts, graders, the diagnosis, the preflight, the small worlds, recipes, reports and tables.

Importing this package also keeps transformers away from our kernels/: transformers probes for a distribution
called `kernels`, and where that one is installed it would import ours in its place. It is optional there, so
it is switched off.
"""
import transformers.utils
import transformers.utils.import_utils

for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *args, **kwargs: False
