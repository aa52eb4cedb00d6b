"""Rivals, one module each; places says where each lies and what brings it.

python -m benchmarks.peers                                  lists them: where, version, or absent
python -m benchmarks.peers --install [FOLDER]               an environment for each, by package
python -m benchmarks.peers --at ik_llama.cpp=SOURCE_TREE    builds llama-bench; or takes a built one
"""
