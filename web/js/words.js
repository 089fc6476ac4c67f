// What the editor says, in the languages of the pack. Quantities keep the names that the text has for them.

const WORDS = {
  en: {
    presets: "Presets…",
    presetsTip: "Write a preset into the text, made for these sides",
    fill: "Sides from model",
    fillTip: "Write the sides of the connected Load STAR into the text",
    scale: "scale {0} of {1} · side {2}",
    every: "drag a bar · double-click for a number",
    named: "The text is the preset {0}: its values are made for the model that draws. Choose it in the menu to see and change them.",
    unknown: "There is no preset {0}. There are: {1}.",
    anyScales: "The text holds for any number of scales. Connect a model to see and drag its bars.",
    own: "checkpoint's own",
    linked: "The text comes over a link, so there is nothing to edit here.",
    show: "Show in text",
    noModel: "No Load STAR is connected to the input model.",
    filled: "Sides of {0}.",
    other: "The model draws {0} scales ({1}), this text has {2}. Nothing was changed: choose a preset to start anew for the model, or add a line `stretch yes`.",
    differs: "The connected model draws {0}, this text is for {1}.",
    failed: "The server did not answer: {0}",
    nothing: "The preset {0} has no part for this node, so nothing was changed.",
    log: "log",
  },
  zh: {
    presets: "预设…",
    presetsTip: "把预设写入文本，并适配当前各尺度的边长",
    fill: "从模型读取边长",
    fillTip: "把所连接的 Load STAR 的各尺度边长写入文本",
    scale: "第 {0}/{1} 尺度 · 边长 {2}",
    every: "拖动柱条 · 双击输入数字",
    named: "文本是预设 {0}：数值会按实际绘制的模型生成。在菜单中选择它即可查看并修改。",
    unknown: "没有名为 {0} 的预设。可用的有：{1}。",
    anyScales: "该文本适用于任意尺度数。连接模型后即可查看并拖动柱条。",
    own: "检查点自带",
    linked: "文本来自连线，此处无法编辑。",
    show: "在文本中定位",
    noModel: "输入 model 没有连接 Load STAR。",
    filled: "已填入 {0} 的边长。",
    other: "模型有 {0} 个尺度（{1}），文本为 {2} 个。未作任何改动：请选择预设为该模型重新开始，或添加一行 `stretch yes`。",
    differs: "所连接的模型为 {0}，文本为 {1}。",
    failed: "服务器没有响应：{0}",
    nothing: "预设 {0} 没有此节点的部分，未作任何改动。",
    log: "对数",
  },
  ja: {
    presets: "プリセット…",
    presetsTip: "プリセットを、このサイズ用にテキストへ書き込みます",
    fill: "モデルのサイズを使う",
    fillTip: "接続された Load STAR のサイズをテキストへ書き込みます",
    scale: "スケール {0}/{1} · 一辺 {2}",
    every: "ドラッグ · ダブルクリックで数値",
    named: "テキストはプリセット {0} です。値は描画するモデルに合わせて作られます。メニューで選ぶと表示・変更できます。",
    unknown: "プリセット {0} はありません。使えるもの: {1}。",
    anyScales: "このテキストはどのスケール数にも使えます。モデルを接続するとバーを表示・ドラッグできます。",
    own: "チェックポイント固有",
    linked: "テキストはリンクから来るため、ここでは編集できません。",
    show: "テキストで表示",
    noModel: "入力 model に Load STAR が接続されていません。",
    filled: "{0} のサイズを記入しました。",
    other: "モデルのスケール数は {0}（{1}）、テキストは {2} です。何も変更していません。プリセットを選んでモデル用に作り直すか、`stretch yes` の行を加えてください。",
    differs: "接続されたモデルは {0}、テキストは {1} 用です。",
    failed: "サーバーが応答しません: {0}",
    nothing: "プリセット {0} にはこのノードの部分がないため、何も変更していません。",
    log: "対数",
  },
};

// What presets do, in languages other than the server's English. A test misses what a new preset lacks.
const DESCRIPTIONS = {
  zh: {
    "checkpoint's own": "未连接调度时，检查点绘制所用的调度",
    "official-256": "top-k 4096，top-p 0.8，引导 ramp 4，不用采样器",
    "official-512": "top-k 4096，top-p 0.8，引导 ramp 4，不用采样器",
    "official-1024": "top-k 4096，因果采样器并参考 transformer 的置信度：8 步，最后一个尺度 15 步",
    "demo-1024": "同 official-1024，但 top-k 600",
    sampler: "top-k 4096，仅用因果采样器：每个细化的尺度 8 步",
    old: "top-k 600，从尺度索引 9 起 300，从 12 起 100；不用采样器",
    "top-k": "top-k 600，top-p 0.8，引导 ramp 4，不用采样器",
    smooth: "VAR 的 more smooth：每个尺度用 Gumbel-softmax，引导 ramp 4",
    fast: "同 official-512；最后两个尺度不用引导，并分别跳过 40 % 与 50 % 的词元",
    "fast-1024": "同 official-1024，采样器步数减半；最后两个尺度同 fast",
    fastest: "同 official-512；最后四个尺度不用引导，其中后三个分别跳过 30 %、40 % 与 50 % 的词元",
  },
  ja: {
    "checkpoint's own": "スケジュールを接続しないときにチェックポイントが使うもの",
    "official-256": "top-k 4096、top-p 0.8、ガイダンス ramp 4、サンプラーなし",
    "official-512": "top-k 4096、top-p 0.8、ガイダンス ramp 4、サンプラーなし",
    "official-1024": "top-k 4096、トランスフォーマーの確信度を使う因果サンプラー：8 ステップ、最後のスケールは 15",
    "demo-1024": "official-1024 と同じで top-k 600",
    sampler: "top-k 4096、因果サンプラーのみ：対象の各スケールで 8 ステップ",
    old: "top-k 600、スケール番号 9 から 300、12 から 100。サンプラーなし",
    "top-k": "top-k 600、top-p 0.8、ガイダンス ramp 4、サンプラーなし",
    smooth: "VAR の more smooth：全スケールで Gumbel-softmax、ガイダンス ramp 4",
    fast: "official-512 と同じ。最後の 2 スケールはガイダンスなしで、トークンの 40 % と 50 % を省く",
    "fast-1024": "official-1024 と同じでサンプラーのステップは半分。最後の 2 スケールは fast と同じ",
    fastest: "official-512 と同じ。最後の 4 スケールはガイダンスなし、うち最後の 3 つはトークンの 30 %、40 %、50 % を省く",
  },
};

/** What a key says in a language (`zh-TW` falls back to `zh`, an unknown one to English). */
export function say(locale, key, ...values) {
  return inLanguage(WORDS, locale)[key].replace(/\{(\d)\}/g, (_, index) => values[Number(index)]);
}

/** What a preset of the server is called in a language: all keep their names but the checkpoint's own. */
export function nameOf(locale, preset) {
  return preset.name === WORDS.en.own ? say(locale, "own") : preset.name;
}

/** What a preset of the server does, in a language; in the server's own words where there are no others. */
export function described(locale, preset) {
  return inLanguage(DESCRIPTIONS, locale)?.[preset.name] ?? preset.description;
}

function inLanguage(table, locale) {
  return table[locale] ?? table[String(locale).split("-")[0]] ?? table.en;
}
