"""Every word of a report, once: (English, Brazilian Portuguese)."""

from __future__ import annotations

from lorabatch.report.text_measure import MEASURE

REASONS = {  # of figures that are null, in the words of measure/gpu.py, measure/system.py, NVML and the C library
    "nvidia-ml-py is not installed": "nvidia-ml-py não está instalado",
    "NVML Shared Library Not Found": "biblioteca da NVML não encontrada",
    "Driver Not Loaded": "driver não carregado",
    "Not Supported": "não suportado",
    "no processor in": "nenhum processador em",
    "not readable at the end": "não legível no fim",
    "Permission denied": "permissão negada",
}
TEXT: dict[str, tuple[str, str]] = MEASURE | {
    # shared
    "title": ("LoRA fine-tuning and batched inference: report", "Relatório: fine-tuning LoRA e inferência em lote"),
    "contents": ("Contents", "Conteúdo"),
    "not_measured": ("not measured", "não medido"),
    "not_applicable": ("–", "–"),
    "not_set": ("not set", "não definido"),
    "unknown": ("unknown", "desconhecido"),
    "empty": ("(empty)", "(vazio)"),
    "more_characters": ("… (+{n} characters)", "… (+{n} caracteres)"),
    "run": ("Run", "Execução"),
    "quantity": ("Quantity", "Grandeza"),
    "error": ("Error", "Erro"),
    "unit steps/min": ("steps/min", "passos/min"),
    "unit requests/s": ("requests/s", "requisições/s"),
    # summary
    "summary": ("Summary", "Resumo"),
    "trained": (
        "{run}: LoRA of rank {rank} on {base}; {trainable} trainable parameters, {share} of {total}; {documents} documents, "
        "{steps} optimiser steps; on {machine}.",
        "{run}: LoRA de posto {rank} sobre {base}; {trainable} parâmetros treináveis, {share} de {total}; {documents} documentos, "
        "{steps} passos do otimizador; em {machine}.",
    ),
    "inferred": (
        "{run}: {completed} requests with {base} {adapter}, at most {batch} at once and {new} new tokens each; on {machine}.",
        "{run}: {completed} requisições com {base} {adapter}, no máximo {batch} por vez e {new} tokens novos cada; em {machine}.",
    ),
    "with_adapter": ("and the adapter {adapter}", "e o adaptador {adapter}"),
    "without_adapter": ("without adapter", "sem adaptador"),
    "ended": (
        "{run} ended as “{status}”{error}: its figures cover only what it did.",
        "{run} terminou como “{status}”{error}: seus números cobrem só o que foi feito.",
    ),
    "key_bits": ("Validation bits per byte, {run}", "Bits por byte na validação, {run}"),
    "key_bits_note": ("before → after; {difference} ({share} of {before})", "antes → depois; {difference} ({share} de {before})"),
    "key_train": ("Training throughput, {run}", "Vazão do treino, {run}"),
    "key_train_note": ("median step {step}", "passo mediano {step}"),
    "key_output": ("Output throughput, {run}", "Vazão de saída, {run}"),
    "key_output_note": ("{whole} with {startup} of start-up", "{whole} com {startup} de inicialização"),
    "key_latency": ("Time per request p50, {run}", "Tempo por requisição p50, {run}"),
    "key_latency_note": ("p95 {p95}, queue included", "p95 {p95}, fila incluída"),
    "kind": ("Kind", "Tipo"),
    "train": ("training", "treino"),
    "infer": ("inference", "inferência"),
    "status": ("Status", "Estado"),
    "completed_status": ("completed", "concluída"),
    "failed_status": ("failed", "falhou"),
    "interrupted_status": ("interrupted", "interrompida"),
    "running_status": ("running, or killed", "em andamento, ou morta"),
    "started": ("Started", "Início"),
    "finished": ("Finished", "Fim"),
    "folder": ("Folder", "Pasta"),
    # environment
    "environment": ("Environment", "Ambiente"),
    "host": ("Host", "Máquina"),
    "os": ("Operating system", "Sistema operacional"),
    "cpu": ("Processor", "Processador"),
    "cores": ("Cores", "Núcleos"),
    "cores_value": ("{usable} usable of {logical}", "{usable} utilizáveis de {logical}"),
    "memory": ("Memory", "Memória"),
    "gpu": ("GPU", "GPU"),
    "no_gpu": ("none used", "nenhuma usada"),
    "execution": ("Ran as", "Executado como"),
    "execution_value": (
        "{dtype} on {device}, {threads} threads, backend {backend}",
        "{dtype} em {device}, {threads} threads, backend {backend}",
    ),
    "commit": ("Commit", "Commit"),
    "dirty": ("{commit} with uncommitted changes", "{commit} com alterações não commitadas"),
    "no_commit": ("unknown (not run from a git checkout)", "desconhecido (não executado de um repositório git)"),
    "slurm": ("Slurm job", "Job Slurm"),
    "no_slurm": ("none", "nenhum"),
    # methodology
    "methodology": ("Methodology", "Metodologia"),
    "measurement": ("How it was measured", "Como foi medido"),
    "how_rates": (
        "Throughput is a sum of tokens over a sum of seconds, never a mean of rates. Training counts real tokens, and only time in "
        "steps; inference counts generated tokens, and start-up (import, load, pack, warm-up) is timed apart.",
        "A vazão é uma soma de tokens dividida por uma soma de segundos, nunca uma média de taxas. O treino conta tokens reais e só o"
        " tempo dos passos; a inferência conta tokens gerados, e a inicialização (importação, carga, empacotamento, aquecimento) é "
        "medida à parte.",
    ),
    "how_latency": (
        "All requests are submitted at the start, so time to first token (TTFT) and time per request (E2EL) include the queue. TPOT ="
        " (E2EL − TTFT) / (output tokens − 1); ITL is every gap between tokens, pooled. With more than one repetition a warm-up comes"
        " first and latencies are pooled over all repetitions.",
        "Todas as requisições são submetidas no início; por isso o tempo até o primeiro token (TTFT) e o tempo por requisição (E2EL) "
        "incluem a fila. TPOT = (E2EL − TTFT) / (tokens de saída − 1); ITL é cada intervalo entre tokens, todos reunidos. Com mais de"
        " uma repetição há antes um aquecimento, e as latências de todas as repetições são reunidas.",
    ),
    "how_quality": (
        "Bits per byte is the negative log-likelihood of the validation text in bits over its UTF-8 bytes; “before” is the base "
        "model, “after” the best evaluation of the run.",
        "Bits por byte é a log-verossimilhança negativa do texto de validação, em bits, dividida por seus bytes em UTF-8; “antes” é o"
        " modelo base, “depois” a melhor avaliação da execução.",
    ),
    "how_missing": (
        "A value that was not measured is shown as “not measured”, never as zero. No speed ratios are given: a ratio needs intervals "
        "that do not overlap, and the absolute values are here to compare.",
        "Um valor que não foi medido aparece como “não medido”, nunca como zero. Não se dão razões de velocidade: uma razão exige "
        "intervalos que não se sobreponham, e os valores absolutos estão aqui para comparar.",
    ),
    "configuration": ("Configuration", "Configuração"),
    "configuration_note": (
        "Only settings that differ from the default somewhere are listed; in bold where they do. All are in run.json.",
        "Só aparecem parâmetros que diferem do padrão em alguma execução, em negrito onde diferem. Todos estão em run.json.",
    ),
    "setting": ("Setting", "Parâmetro"),
    "default": ("Default", "Padrão"),
    "data": ("Data", "Dados"),
    "no_data": ("No training run recorded its data.", "Nenhuma execução de treino registrou seus dados."),
    "train_part": ("{run}, train", "{run}, treino"),
    "val_part": ("{run}, validation", "{run}, validação"),
    "documents_read": ("Documents read", "Documentos lidos"),
    "documents": ("Documents used", "Documentos usados"),
    "split": ("Documents split at the length limit", "Documentos divididos no limite de comprimento"),
    "cut": ("Answers cut at the length limit", "Respostas cortadas no limite de comprimento"),
    "dropped": ("Documents dropped", "Documentos descartados"),
    "tokens": ("Tokens", "Tokens"),
    "target_tokens": ("Tokens in the loss", "Tokens na perda"),
    "median_tokens": ("Median length (tokens)", "Comprimento mediano (tokens)"),
    "longest_tokens": ("Longest (tokens)", "Mais longo (tokens)"),
    # results
    "results": ("Results", "Resultados"),
    "training": ("Training", "Treino"),
    "inference": ("Inference", "Inferência"),
    "steps": ("Optimiser steps", "Passos do otimizador"),
    "loss": ("Training loss, last step", "Perda de treino, último passo"),
    "eval_loss_before": ("Validation loss before", "Perda de validação antes"),
    "eval_loss": ("Validation loss after (best)", "Perda de validação depois (melhor)"),
    "perplexity": ("Validation perplexity after (best)", "Perplexidade de validação depois (melhor)"),
    "bits_per_byte_before": ("Validation bits per byte before", "Bits por byte na validação antes"),
    "bits_per_byte": ("Validation bits per byte after (best)", "Bits por byte na validação depois (melhor)"),
    "best_step": ("Best evaluation at step", "Melhor avaliação no passo"),
    "train_s": ("Time in steps", "Tempo em passos"),
    "epoch_s": ("Time per epoch, in steps", "Tempo por época, em passos"),
    "epoch_estimate": ("about {time} at this rate (none completed)", "cerca de {time} neste ritmo (nenhuma concluída)"),
    "p50_step_ms": ("Step time p50", "Tempo por passo p50"),
    "p95_step_ms": ("Step time p95", "Tempo por passo p95"),
    "steps_per_min": ("Step rate", "Taxa de passos"),
    "tokens_per_s": ("Training throughput", "Vazão do treino"),
    "total_tokens": ("Tokens seen", "Tokens vistos"),
    "iterations": ("Repetitions measured", "Repetições medidas"),
    "completed": ("Requests completed, all repetitions", "Requisições concluídas, todas as repetições"),
    "failed": ("Requests failed", "Requisições com falha"),
    "finish_reasons": ("Ended by end token / length limit", "Fim por token final / limite de comprimento"),
    "total_input_tokens": ("Prompt tokens", "Tokens dos prompts"),
    "total_output_tokens": ("Generated tokens", "Tokens gerados"),
    "duration_s": ("Generation time", "Tempo de geração"),
    "startup_s": ("Start-up time", "Tempo de inicialização"),
    "output_throughput": ("Output throughput without start-up", "Vazão de saída sem inicialização"),
    "tokens_per_s_including_startup": ("Output throughput with start-up", "Vazão de saída com inicialização"),
    "total_token_throughput": ("Prompt and output throughput", "Vazão de prompts e saída"),
    "request_throughput": ("Request rate", "Taxa de requisições"),
    "prefill_tokens_per_s": ("Prefill rate", "Taxa de prefill"),
    "decode_tokens_per_s": ("Decode rate", "Taxa de decodificação"),
    "mean_running": ("Requests at once, mean in decode", "Requisições simultâneas, média na decodificação"),
    "max_running": ("Requests at once, most", "Requisições simultâneas, máximo"),
    "latency": ("Latency", "Latência"),
    "queue_ms": ("Queue", "Fila"),
    "ttft_ms": ("Time to first token (TTFT)", "Tempo até o primeiro token (TTFT)"),
    "tpot_ms": ("Time per output token (TPOT)", "Tempo por token de saída (TPOT)"),
    "itl_ms": ("Gap between tokens (ITL)", "Intervalo entre tokens (ITL)"),
    "e2el_ms": ("Time per request (E2EL)", "Tempo por requisição (E2EL)"),
    "batch_latency": ("Time per batch, over repetitions", "Tempo por lote, entre repetições"),
    # examples
    "examples": ("Completions before and after", "Exemplos antes/depois"),
    "examples_single": ("Completions", "Exemplos de respostas"),
    "pairs": (
        "{shown} of {count} pairs with the same id and prompt, taken evenly over the input order, not chosen by quality. The two "
        "texts are identical in {same} of {count} pairs. Before: {base}. After: {tuned}.",
        "{shown} de {count} pares com o mesmo id e o mesmo prompt, tomados uniformemente na ordem de entrada, não escolhidos pela "
        "qualidade. Os dois textos são idênticos em {same} de {count} pares. Antes: {base}. Depois: {tuned}.",
    ),
    "no_pairs": (
        "No pair of runs, one with and one without adapter on the same base, shares prompts; so there is no before and after to show."
        " {shown} of {count} completions of {run}, taken evenly over the input order.",
        "Nenhum par de execuções, uma com e outra sem adaptador sobre a mesma base, tem prompts em comum; por isso não há antes e "
        "depois a mostrar. {shown} de {count} respostas de {run}, tomadas uniformemente na ordem de entrada.",
    ),
    "prompt": ("Prompt", "Prompt"),
    "before": ("Before ({run})", "Antes ({run})"),
    "after": ("After ({run})", "Depois ({run})"),
    # efficiency
    "efficiency": ("Efficiency", "Eficiência"),
    "arithmetic": (
        "Arithmetic of training (4N) and decode (2N): achieved of the rate measured with cold weights",
        "Aritmética do treino (4N) e da decodificação (2N): obtido da taxa medida com pesos frios",
    ),
    "mbu": ("Memory reads in decode: achieved of measured peak", "Leitura de memória na decodificação: obtido do pico medido"),
    "share_of": ("{value} of {ceiling} ({share})", "{value} de {ceiling} ({share})"),
    "peak_memory_bytes": ("Peak memory (GPU, else process)", "Pico de memória (GPU, senão processo)"),
    "cpu_percent": ("CPU, mean (100% is one core)", "CPU, média (100% é um núcleo)"),
    "cpu_wait_percent": ("Waiting for a core that others used, mean", "Esperando um núcleo que outros usavam, média"),
    "cpu_energy_j": ("Energy of the node's processors", "Energia dos processadores do nó"),
    "gpu_figures": ("GPU: activity, memory, power, energy, PCIe", "GPU: atividade, memória, potência, energia, PCIe"),
    "gpu_sm_active_percent": ("GPU multiprocessors with work, mean", "Multiprocessadores da GPU com trabalho, média"),
    "gpu_tensor_active_percent": ("GPU tensor cores active, mean", "Tensor cores da GPU ativos, média"),
    "gpu_dram_active_percent": ("GPU memory rate, of its peak, mean", "Taxa da memória da GPU, do seu pico, média"),
    "gpu_sm_mhz": ("GPU clock, mean", "Relógio da GPU, média"),
    "gpu_pcie_rx_bytes_per_s": ("PCIe to the GPU, mean", "PCIe para a GPU, média"),
    "gpu_pcie_tx_bytes_per_s": ("PCIe from the GPU, mean", "PCIe da GPU, média"),
    "gpu_util_percent": ("GPU busy in time, mean", "GPU ocupada no tempo, média"),
    "max_gpu_memory_bytes": ("GPU memory, most sampled", "Memória da GPU, máximo amostrado"),
    "gpu_power_w": ("GPU power, mean", "Potência da GPU, média"),
    "energy_j": ("GPU energy", "Energia da GPU"),
    "padding_share": ("Padding among the tokens", "Preenchimento (padding) entre os tokens"),
    "sampler_cpu_s": ("CPU time of the sampler itself", "Tempo de CPU do próprio amostrador"),
    "phase": ("Phase of training", "Fase do treino"),
    "import_s": ("Import", "Importação"),
    "tokenise_s": ("Tokenisation", "Tokenização"),
    "load_s": ("Model load", "Carga do modelo"),
    "loop_s": ("Loop (steps, evaluation, saving)", "Laço (passos, avaliação, gravação)"),
    "save_s": ("of which saving", "dos quais gravação"),
    # failures
    "failures": ("Failures", "Falhas"),
    "failures_note": ("{shown} of {count} error records.", "{shown} de {count} registros de erro."),
    "id": ("Request", "Requisição"),
    # threats
    "threats": ("Threats to validity", "Ameaças à validade"),
    "one_seed": (
        "{runs}: one seed, so nothing here tells how much the result varies between seeds.",
        "{runs}: uma só semente; por isso nada aqui diz quanto o resultado varia entre sementes.",
    ),
    "one_repetition": (
        "{runs}: one repetition, so no confidence interval can be given for throughput or batch latency.",
        "{runs}: uma repetição; por isso não se pode dar intervalo de confiança para a vazão nem para a latência por lote.",
    ),
    "repetitions": (
        "{run}: {count} repetitions in one process; they show noise within one run, not between runs or days.",
        "{run}: {count} repetições em um só processo; mostram o ruído dentro de uma execução, não entre execuções ou dias.",
    ),
    "few_requests": (
        "{runs}: fewer than {least} measured requests, so p99 is practically the maximum.",
        "{runs}: menos de {least} requisições medidas; por isso p99 é praticamente o máximo.",
    ),
    "val_size": (
        "{run}: the validation set has {documents} documents and {tokens} tokens in the loss{small}.",
        "{run}: o conjunto de validação tem {documents} documentos e {tokens} tokens na perda{small}.",
    ),
    "best_of": (
        "{run}: the best of {evals} evaluations on one validation set is reported, which is slightly optimistic.",
        "{run}: relata-se a melhor de {evals} avaliações sobre um mesmo conjunto de validação, o que é levemente otimista.",
    ),
    "small": (", which is small: a little change may be chance", ", o que é pouco: uma mudança pequena pode ser acaso"),
    "no_validation": ("{run}: no validation, so nothing is known about quality.", "{run}: sem validação; nada se sabe sobre a qualidade."),
    "greedy": (
        "{runs}: greedy decoding; the same weights, type and batch give the same text.",
        "{runs}: decodificação gulosa; os mesmos pesos, tipo e lote dão o mesmo texto.",
    ),
    "sampled": (
        "{run}: sampled (temperature {temperature}, seed {seed}); another seed gives other texts, and the examples are one draw.",
        "{run}: amostrado (temperatura {temperature}, semente {seed}); outra semente dá outros textos, e os exemplos são um sorteio.",
    ),
    "shared": (
        "{run} waited for a core {wait} as long as it computed: the machine was shared, which slows and scatters its times.",
        "{run} esperou por um núcleo {wait} do tempo em que calculou: a máquina estava compartilhada, o que atrasa e espalha seus tempos.",
    ),
    "shared_unknown": (
        "{runs}: the records do not say what else ran on the machine; a shared machine slows and scatters the times.",
        "{runs}: os registros não dizem o que mais rodava na máquina; uma máquina compartilhada atrasa e espalha os tempos.",
    ),
    "hosts": (
        "Different machines ({hosts}): each run is labelled with its own, and times are not to be compared between them.",
        "Máquinas diferentes ({hosts}): cada execução traz a sua no nome, e os tempos não devem ser comparados entre elas.",
    ),
    "no_state": (
        "{runs}: the state of the code is not known exactly (no commit, or uncommitted changes).",
        "{runs}: o estado do código não é conhecido com exatidão (sem commit, ou com alterações não commitadas).",
    ),
    "resumed": (
        "{run}: {count} completions on disk, but the metrics cover {measured} of them (a resumed run measures its last session).",
        "{run}: {count} respostas em disco, mas as métricas cobrem {measured} delas (uma execução retomada mede a última sessão).",
    ),
    "truncated": ("{run}: {count} prompts were cut to fit the model.", "{run}: {count} prompts foram cortados para caber no modelo."),
    # reproduction
    "reproduce": ("How to reproduce", "Como reproduzir"),
    "reproduce_note": (
        "From the project's folder, at the commit and with the versions of the environment table. These are the commands as they were run:",
        "Na pasta do projeto, no commit e com as versões da tabela de ambiente. Estes são os comandos como foram executados:",
    ),
    "reproduce_data": (
        "Input files are named, not stored, in the records; the figures come only from {files} of each run folder.",
        "Os arquivos de entrada são nomeados, não guardados, nos registros; os números vêm só de {files} de cada pasta de execução.",
    ),
    # figures
    "fig_loss": (
        "Loss (nats per token) and learning rate by step; the markers are evaluations.",
        "Perda (nats por token) e taxa de aprendizado por passo; os marcadores são avaliações.",
    ),
    "fig_throughput": (
        "Training throughput of every step; the dashed line is all tokens over all time in steps.",
        "Vazão de cada passo do treino; a linha tracejada é o total de tokens sobre o tempo total em passos.",
    ),
    "fig_latency": (
        "Share of requests that were at most this slow (first repetition).",
        "Fração das requisições que levaram no máximo este tempo (primeira repetição).",
    ),
    "fig_system": ("What the process used, sampled about once a second.", "O que o processo usou, amostrado cerca de uma vez por segundo."),
    "thinned": ("At most {n} points are drawn per line.", "No máximo {n} pontos são desenhados por linha."),
    "alt_loss": (
        "{run}: training loss {first} at step {first_step}, {last} at step {last_step}",
        "{run}: perda de treino {first} no passo {first_step}, {last} no passo {last_step}",
    ),
    "axis_step": ("step", "passo"),
    "axis_loss": ("loss (nats/token)", "perda (nats/token)"),
    "axis_lr": ("learning rate", "taxa (lr)"),
    "axis_tokens": ("tokens/s", "tokens/s"),
    "axis_share": ("share of requests", "fração das requisições"),
    "axis_time": ("time since start (s)", "tempo desde o início (s)"),
    "axis_cpu": ("CPU (%)", "CPU (%)"),
    "axis_rss": ("memory (GiB)", "memória (GiB)"),
    "axis_gpu": ("GPU busy (%)", "GPU ocupada (%)"),
    "axis_gpu_memory": ("GPU mem. (GiB)", "mem. GPU (GiB)"),
    "axis_power": ("GPU power (W)", "potência GPU (W)"),
    "line_train": ("{run}, training", "{run}, treino"),
}
