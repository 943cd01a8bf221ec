"""The only importer of ray and deepspeed below the command line, besides data_prep and tune_spaces."""
