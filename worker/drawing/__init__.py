"""A token for each row, drawn by kernels: the same token as `sampler.sample` draws in plain torch, for CUDA.

Rows are cut into tiles, and most kernels give a tile to a program, so that the whole device works on however few rows.
What a kernel needs of other tiles an earlier one has left in memory: nothing waits for another program.
draw.py launches them:

1. `weighing.find_peaks`: the largest logit of each tile.
2. `weighing.weigh`: how much each tile weighs. Of rows with top-k or top-p also how many of its tokens lie in each of
   so many bins, by how far their logits are below the row's largest.
3. `gathering.decide`, a row to a program: in which bins the border lies. Counts tell for top-k; for top-p they bound
   what a bin weighs.
4. `gathering.gather`: the tokens down to there, in the order of their ids.
5. `borders.find_border`, a row to a program: the border among those gathered, and the token, for all that is kept is
   there.
6. `weighing.keep`: what each tile's kept tokens weigh, for the few rows that keep too many for that.
7. `choosing.choose`, a row to a program: the tile that holds the token, and the token in it.

Without top-k and top-p only the first two and the last run. Counts and weights are whole numbers, so no order of
additions can change a result, and nothing depends on the batch. What a token weighs is in tokens.py.

Imported only where it runs; Triton comes with torch's CUDA builds.
"""
