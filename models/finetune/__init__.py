"""Methods that finetune, one file each: which parts of a model learn, and how they are written and merged."""
