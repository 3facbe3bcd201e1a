"""The thin trainer of chatdata's builds: nanochat's model, its loss, optimizers, schedules, import and export."""
