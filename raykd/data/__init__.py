"""Data: a batch is a pure function of its keys (data set, seed, epoch, global position).

keys        counter-based randomness: Philox, permutations, keyed generators
sets        the DataSet protocol; `open_split`, `probe`, views (subset, label noise)
shards      Arrow and Parquet shards: files, footers, row groups
folders     images in one directory a class
packaged    digits, and torchvision's sets as far as they do not unpickle
decoding    encoded images to uint8, and the decoded cache
augment     crop, flip, resized crop, RandAugment, erasing; mixing holds mixup and cutmix
batches     Batch, Plan (position to samples), make_batch, recipes, evaluation batches
loader      prefetch in threads or processes, resumable at any step
normalise   uint8 to a model's own mean, standard deviation and size
"""
