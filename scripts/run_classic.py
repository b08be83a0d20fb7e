# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Run a published experiment that explains mixtures of experts, with a table beside the published one, and a plot.

python scripts/run_classic.py vowels_1991 --vowel_file peterson_barney_1952.csv
python scripts/run_classic.py vowels_1991    # formants drawn from the means and deviations of each vowel
python scripts/run_classic.py clusters_2022 --settings 1 2 --num_runs 3
python scripts/run_classic.py multilinear_digits    # images of digits, from scikit-learn
python scripts/run_classic.py soft_digits --num_runs 3 --contenders dense "soft, 16 experts"
python scripts/run_classic.py specialisation --text_folder FOLDER    # that examples/mixed_corpus.py wrote
python scripts/run_classic.py translation_2017 --french_file eng-fra.txt.xz --german_file eng-deu.txt.xz
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["classic", *sys.argv[1:]]))
