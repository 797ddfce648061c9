"""Post-train a language model from a config."""

import logging

# When it is imported, bitsandbytes asks for a kernel without a backward pass, whether anything is quantized or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
