"""What is wrong to a type checker: it finds an error in every line with an `opt.`, and in no other."""

import optimisers as opt

opt.Adam("fast")
opt.Adam(beta=0.9)
opt.Adam(lr=0.1)
opt.setup(opt.Adam, {})
opt.freez(1)
opt.by_type("Linear")
opt.matrices & 3
