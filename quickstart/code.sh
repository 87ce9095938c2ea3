# code_hash FILE...: of all code that makes results here, and of FILE; run.sh and seeds.sh source this. From the root.
code_hash() {
    {
        cat quickstart/*.py quickstart/*.json reproduce/run.py reproduce/steps.py reproduce/settings/tiny.json \
            report/outlier_channels.py requirements.txt "$@"
        find base_model switch_precision cpt adv_attack -name results -prune -o -name "*.py" -print0 \
            -o -name "*.sh" -print0 -o -name "*.[ch]" -print0 | LC_ALL=C sort -z | xargs -0 cat
    } | sha256sum | cut -d ' ' -f 1
}
