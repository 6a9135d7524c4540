"""Run a command line of the seeds here: it is translated, printed, and run.

python scripts/from_seed.py -- python train_blip3o_dit.py --embeddings_path x.pkl --output_dir y
"""

import sys

from blip3o_lit.seeds.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
