"""The words of a report about ceilings, sweeps, energy and advice: (English, Brazilian Portuguese)."""

from __future__ import annotations

MEASURE: dict[str, tuple[str, str]] = {
    "advice": ("What to change next time", "O que mudar na próxima vez"),
    "no_advice": (
        "Nothing in the records asks for a change.",
        "Nada nos registros pede mudança.",
    ),
    "advice_memory": (
        "{run} used {share} of the memory requested ({used} of {asked}): ask for --mem={suggested}G.",
        "{run} usou {share} da memória pedida ({used} de {asked}): peça --mem={suggested}G.",
    ),
    "advice_memory_tight": (
        "{run} used {share} of the memory requested ({used} of {asked}): ask for --mem={suggested}G, or it may be killed.",
        "{run} usou {share} da memória pedida ({used} de {asked}): peça --mem={suggested}G, ou pode ser morta.",
    ),
    "advice_cores": (
        "{run} kept {used} of {cores} cores busy: ask for --cpus-per-task={suggested}, or give it more work per step.",
        "{run} ocupou {used} de {cores} núcleos: peça --cpus-per-task={suggested}, ou dê mais trabalho por passo.",
    ),
    "advice_throttled": (
        "{run} was held back by its CPU quota for {share} of the time: fewer --threads, or a larger quota.",
        "{run} foi contida pela cota de CPU em {share} do tempo: menos --threads, ou uma cota maior.",
    ),
    "advice_gpu_train": (
        "{run}: the GPU was idle {idle} of the time: larger --block_tokens or --batch_size.",
        "{run}: a GPU ficou ociosa {idle} do tempo: aumente --block_tokens ou --batch_size.",
    ),
    "advice_gpu_infer": (
        "{run}: the GPU was idle {idle} of the time: more requests at once (--batch_size).",
        "{run}: a GPU ficou ociosa {idle} do tempo: mais requisições simultâneas (--batch_size).",
    ),
    "advice_slowed": (
        "{run}: the GPU's clock was held down ({reason}) in {share} of the samples.",
        "{run}: o relógio da GPU foi reduzido ({reason}) em {share} das amostras.",
    ),
    "advice_ceiling": (
        "{run} was faster than the ceiling measured for this machine, so the machine was busy then: run lorabatch bench machine again.",
        "{run} foi mais rápida que o teto medido desta máquina, que portanto estava ocupada: rode lorabatch bench machine de novo.",
    ),
    "advice_slow": (
        "{run} reached {share} of what this machine can do with cold weights: {why}.",
        "{run} alcançou {share} do que esta máquina consegue com pesos frios: {why}.",
    ),
    "slow_kernels": (
        "torch's own operators served instead of our kernels ({why})",
        "os operadores do torch serviram no lugar dos nossos kernels ({why})",
    ),
    "slow_waited": (
        "it waited for cores that others used ({share} of the time computed)",
        "esperou núcleos que outros usavam ({share} do tempo de cálculo)",
    ),
    "slow_few_rows": (
        "its steps have {rows} tokens, so that products use each weight too seldom (--batch_size)",
        "seus passos têm {rows} tokens, e os produtos usam cada peso raramente demais (--batch_size)",
    ),
    "slow_unknown": (
        "the records show no cause; lorabatch profile {command} says where the time goes",
        "os registros não mostram a causa; lorabatch profile {command} diz onde o tempo foi gasto",
    ),
    "advice_evaluation": (
        "{run} spent {share} of its loop on evaluation and saving: a larger --eval_every_steps or a smaller --max_val_documents.",
        "{run} gastou {share} do laço em avaliação e gravação: aumente --eval_every_steps ou reduza --max_val_documents.",
    ),
    "advice_startup": (
        "{run} spent {share} of its time on start-up: put more prompts into one run.",
        "{run} gastou {share} do tempo na inicialização: ponha mais prompts em uma execução.",
    ),
    "advice_drained": (
        "{run} had {mean} of {most} requests running on average, because a short file drains: more prompts per run raise the throughput.",
        "{run} teve em média {mean} de {most} requisições em andamento, pois um arquivo curto se esgota: mais prompts por execução "
        "elevam a vazão.",
    ),
    "advice_knee": (
        "{run}: beyond {knee} requests at once a doubling brings less than 1.5 times the throughput: --batch_size {knee} unless latency "
        "does not matter.",
        "{run}: além de {knee} requisições simultâneas, dobrar rende menos de 1,5 vez a vazão: --batch_size {knee}, se a latência importa.",
    ),
    "advice_no_knee": (
        "{run}: throughput still grew at {knee}, the largest level tried: try larger ones.",
        "{run}: a vazão ainda crescia em {knee}, o maior nível testado: teste maiores.",
    ),
    "advice_serial": (
        "{run}: by Amdahl's law {share} of the work does not run in parallel, so no number of threads gives more than {limit} times one.",
        "{run}: pela lei de Amdahl {share} do trabalho não é paralelo; nenhum número de threads rende mais que {limit} vezes uma só.",
    ),
    "unlimited": ("any number of", "qualquer número de"),
    # sweeps
    "sweeps": ("Sweeps", "Varreduras"),
    "sweep_note": (
        "Medians of alternating repetitions; the bars hold the median of any distribution with at least 95% (order statistics). “–”: "
        "fewer than six repetitions.",
        "Medianas de repetições alternadas; as barras contêm a mediana de qualquer distribuição com pelo menos 95% (estatísticas de "
        "ordem). “–”: menos de seis repetições.",
    ),
    "sweep_where": ("{run} ({kind}), measured on {machine}:", "{run} ({kind}), medido em {machine}:"),
    "level_batch_size": ("Batch size", "Tamanho do lote"),
    "level_threads": ("Threads", "Threads"),
    "sweep_rate": ("Median throughput", "Vazão mediana"),
    "sweep_interval": ("Interval of the median", "Intervalo da mediana"),
    "sweep_speedup": ("Times the first row", "Vezes a primeira linha"),
    "sweep_karp_flatt": ("Serial share (Karp-Flatt)", "Fração serial (Karp-Flatt)"),
    "sweep_weak_rate": ("Median throughput, work growing with the threads", "Vazão mediana, trabalho que cresce com as threads"),
    "sweep_laws": (
        "First table: the same work for every number of threads (strong scaling): {strong} of it is serial by Amdahl's law. Second "
        "table: work that grows with the threads (weak scaling): {weak} is serial by Gustafson's law.",
        "Primeira tabela: o mesmo trabalho para todo número de threads (escalabilidade forte): {strong} dele é serial pela lei de "
        "Amdahl. Segunda tabela: trabalho que cresce com as threads (escalabilidade fraca): {weak} é serial pela lei de Gustafson.",
    ),
    "axis_weak": ("work × threads", "trabalho × threads"),
    "sweep_latency": ("Time per batch or step, median", "Tempo por lote ou passo, mediana"),
    "fig_sweep": (
        "Throughput by level, with intervals of the median; dotted: proportional growth from the first level; vertical line: the knee.",
        "Vazão por nível, com intervalos da mediana; pontilhado: crescimento proporcional a partir do primeiro nível; linha vertical: o "
        "joelho.",
    ),
    "axis_ideal": ("proportional", "proporcional"),
    "axis_knee": ("knee", "joelho"),
    # roofline
    "fig_roofline": (
        "Roofline: what the measured memory rate and the measured arithmetic rate of this machine allow, and where the runs were. "
        "Training counts the frozen weights read twice per block; decoding the weights and cached keys and values of every step.",
        "Roofline: o que as taxas medidas de memória e de aritmética desta máquina permitem, e onde ficaram as execuções. O treino conta "
        "os pesos congelados lidos duas vezes por bloco; a decodificação, os pesos e as chaves e valores em cache de cada passo.",
    ),
    "axis_intensity": ("arithmetic intensity (flop/byte)", "intensidade aritmética (flop/byte)"),
    "axis_gflops": ("Gflop/s", "Gflop/s"),
    # energy and system
    "co2e": ("CO2e of the energy measured", "CO2e da energia medida"),
    "missing": ("Not measured in {runs}, and why: {reasons}.", "Não medido em {runs}, e por quê: {reasons}."),
    "co2e_note": (
        "CO2e = energy of GPU and processors, as far as measured, × {factor} g/kWh (default 98.3: Brazil, 2023, CodeCarbon's table of "
        "grids; PUE 1.0). Both are read from counters: the board's, and the processors' (RAPL), which counts all that ran on the node.",
        "CO2e = energia da GPU e dos processadores, na medida em que foi medida, × {factor} g/kWh (padrão 98,3: Brasil, 2023, tabela de "
        "redes do CodeCarbon; PUE 1,0). Ambas vêm de contadores: o da placa e o dos processadores (RAPL), que conta tudo o que rodou no "
        "nó.",
    ),
    "read_bytes_per_s": ("Bytes read by system calls, mean rate", "Bytes lidos por chamadas de sistema, taxa média"),
    "write_bytes_per_s": ("Bytes written by system calls, mean rate", "Bytes escritos por chamadas de sistema, taxa média"),
    "disk_read_bytes_per_s": ("Bytes read from devices, mean rate", "Bytes lidos de dispositivos, taxa média"),
    "disk_write_bytes_per_s": ("Bytes written to devices, mean rate", "Bytes escritos em dispositivos, taxa média"),
    "max_pss_bytes": ("Process memory, shared pages divided, most sampled", "Memória, páginas compartilhadas divididas, máximo amostrado"),
    "throttled_share": ("Held back by its CPU quota", "Contida pela cota de CPU"),
    "axis_io": ("read + write (MB/s)", "leitura + escrita (MB/s)"),
    "startup_phase": ("Start-up (import, load, pack)", "Inicialização (importação, carga, empacotamento)"),
    "prefill_s": ("Prefill", "Prefill"),
    "decode_s": ("Decode", "Decodificação"),
    "phase_infer": ("Phase of inference", "Fase da inferência"),
    "rest_s": ("Scheduling, text, output", "Escalonamento, texto, saída"),
}
