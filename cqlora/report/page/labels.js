// What the page says, in two languages; a key without an entry shows as it is.
const LABELS = {
  en: {
    run: "Run", sweep: "Sweep", written: "written", language: "中文", theme: "Theme", auto: "system", light: "light", dark: "dark",
    steps: "Steps", tokens: "Tokens", time: "Training time", speed: "Tokens per second", memory: "Peak memory",
    planned: "planned {0}", state: "State", step: "step", elapsed: "training time (s)", seen: "tokens",
    axis: "Axis", smoothing: "Smoothing", measure: "Measure",
    beforeAfter: "Before and after", source: "Source", lang: "Language", start: "start", end: "end", change: "change",
    scored: "tokens scored", losses: "Losses", trainLoss: "training", trainLossName: "training loss", allDefaults: "All are the groups' own values.",
    bitsHint: "lower is better; bits per character: what the text takes to write down, whatever the vocabulary", heldOut: "Held-out text",
    learning_rate: "Learning rate", grad_norm: "Gradient norm", tokens_per_second: "Tokens per second",
    peak_memory_gib: "Peak memory (GiB)", mix: "The mix", documents: "documents read", kept: "kept to train",
    rejected: "rejected", duplicates: "duplicates", trainTokens: "tokens", characters: "characters",
    perCharacter: "tokens per Chinese character", settings: "Configuration", onlyChanged: "only what was chosen",
    key: "Key", value: "Value", default: "Default", filter: "Filter", events: "What happened", event: "Event",
    details: "Details", commands: "Go on", resume: "Go on with this run",
    evaluate: "Evaluate", merge: "Merge", chat: "Talk", noEvents: "No restarts, skipped steps or errors.",
    evaluation: "Evaluation", model: "Model", probe: "In-context probe", pattern: "Pattern", example: "example",
    choice: "Multiple choice", task: "Task", shots: "shots", generations: "Generations", replies: "Replies during training", noEvaluation: "No evaluation.json in the run's folder; the command below writes it.",
    runs: "Runs", allStates: "all states", curves: "Curves", parallel: "Parallel coordinates",
    parallelHint: "Drag along an axis to choose runs; the table and the curves follow. Click the axis to let go.",
    scatter: "Any two", pareto: "Pareto front", importances: "What explains a measure",
    importanceHint: "Share of the variance that a setting explains by itself (omega squared), over {0} runs.",
    tooFew: "{0} runs have this measure; a share needs {1} or more.", differing: "What differs",
    csv: "CSV", json: "JSON", shown: "{0} of {1} runs", number: "No.", failures: "Failures", open: "page",
    points: "{0} of {1} lines drawn: neighbours are averaged.", lower: "lower is better", higher: "higher is better",
    x: "X", y: "Y", updated: "updated {0}", lost: "the server does not answer; what is shown is of {0}",
    loss: "loss", relative: "loss against the start (%)", perplexity: "perplexity", bits_per_character: "bits per character", bits_per_byte: "bits per byte",
    finished: "finished", running: "running", failed: "failed", interrupted: "interrupted", stopped: "stopped",
    pruned: "pruned", refused: "refused", missing: "not begun", notes: "Notes", noNumbers: "No numbers yet.",
    ended: "ended", cut: "cut", language_share: "in the language asked", repetition: "repetition", base: "base",
  },
  zh: {
    run: "训练", sweep: "超参搜索", written: "生成于", language: "English", theme: "外观", auto: "跟随系统", light: "浅色", dark: "深色",
    steps: "步数", tokens: "词元", time: "训练用时", speed: "词元/秒", memory: "显存/内存峰值",
    planned: "预估 {0}", state: "状态", step: "步", elapsed: "训练用时（秒）", seen: "词元数",
    axis: "横轴", smoothing: "平滑", measure: "指标",
    beforeAfter: "训练前后", source: "来源", lang: "语言", start: "训练前", end: "训练后", change: "变化",
    scored: "评测词元数", losses: "损失", trainLoss: "训练", trainLossName: "训练损失", allDefaults: "全部为配置组的默认值。",
    bitsHint: "越低越好；每字符比特数：编码一个字符平均所需的比特，与词表无关", heldOut: "留出文本",
    learning_rate: "学习率", grad_norm: "梯度范数", tokens_per_second: "词元/秒",
    peak_memory_gib: "内存峰值（GiB）", mix: "数据配比", documents: "读入文档", kept: "用于训练",
    rejected: "无法读取", duplicates: "重复", trainTokens: "词元", characters: "字符",
    perCharacter: "每汉字词元数", settings: "配置", onlyChanged: "只看改过的",
    key: "键", value: "值", default: "默认值", filter: "筛选", events: "过程事件", event: "事件",
    details: "详情", commands: "接下来", resume: "继续这次训练",
    evaluate: "评测", merge: "合并", chat: "对话", noEvents: "没有重启、跳步或错误。",
    evaluation: "评测", model: "模型", probe: "上下文学习探针", pattern: "模式", example: "第几例",
    choice: "选择题", task: "任务", shots: "示例数", generations: "生成样例", replies: "训练中的回复", noEvaluation: "训练文件夹里没有 evaluation.json；用下面的命令生成。",
    runs: "各次训练", allStates: "全部状态", curves: "曲线", parallel: "平行坐标",
    parallelHint: "沿坐标轴拖动可框选，表格与曲线随之变化；单击坐标轴取消。",
    scatter: "任选两项", pareto: "帕累托前沿", importances: "指标受什么影响",
    importanceHint: "单个设置能解释的方差占比（ω²），共 {0} 次训练。",
    tooFew: "只有 {0} 次训练有此指标；少于 {1} 次时占比没有意义。", differing: "不同之处",
    csv: "CSV", json: "JSON", shown: "{0}/{1} 次", number: "编号", failures: "失败的任务", open: "页面",
    points: "共 {1} 行，画 {0} 点：相邻各行取平均。", lower: "越低越好", higher: "越高越好",
    x: "横轴", y: "纵轴", updated: "更新于 {0}", lost: "服务器没有响应；当前内容截至 {0}",
    loss: "损失", relative: "损失相对训练前（%）", perplexity: "困惑度", bits_per_character: "每字符比特数", bits_per_byte: "每字节比特数",
    finished: "已完成", running: "进行中", failed: "失败", interrupted: "被中断", stopped: "已停止",
    pruned: "提前剪枝", refused: "未获准启动", missing: "未开始", notes: "说明", noNumbers: "还没有数据。",
    ended: "自然结束", cut: "被截断", language_share: "所要求语言的占比", repetition: "重复率", base: "基座",
  },
};

let language = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";

function say(key, ...values) {
  const text = LABELS[language][key] ?? key;
  return values.reduce((told, value, place) => told.replace(`{${place}}`, () => String(value)), text);
}

function formatNumber(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString(language);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(2) : value.toLocaleString(language, { maximumSignificantDigits: Math.max(digits, size >= 1000 ? 5 : digits) });
}

function formatSeconds(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  const clock = [minutes, Math.floor(seconds % 60)].map((part) => String(part).padStart(2, "0")).join(":");
  return hours ? `${hours}:${clock}` : clock;
}
