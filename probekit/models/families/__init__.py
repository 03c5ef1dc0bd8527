"""The families of models, one file each; a file's `FORMATS` say what `load` recognises as a model of it."""
